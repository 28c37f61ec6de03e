"""Classification (ImageNet, CUB-200, any image folder) with Matching Guided Distillation, on the core of `d2_mgd`.

`main_base.py` trains without a teacher and evaluates; `main_mgd.py` distils. Detectron2 is not needed.
"""

from d2_mgd._threads import let_waiting_threads_sleep

let_waiting_threads_sleep()
