"""What a data set's files hold, before and while it is trained on. Imports neither PyTorch nor Detectron2.

`images` reads an image file as training sees it, `files` says where files are, `class_folders` which images a class
has, and `coco` what is wrong with a json file in COCO's format.
"""
