"""The demos: their images, trainings and reports."""
