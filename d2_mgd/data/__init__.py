"""Reading and checking data sets, without PyTorch and Detectron2.

`images` decodes image files, `files` finds them, `class_folders` lists images by class, `coco` and `inspection` check
data sets in COCO format, and `yolo` and `voc` convert other label formats to it.
"""
