"""Write a trained student as ONNX, TorchScript or torch.export file, and check that the file answers the same.

Contains no detector and no classifier: a task describes its student by a :class:`Student`.
"""

from d2_mgd.export.exporting import Exported, Options, export
from d2_mgd.export.formats import FORMATS, Runtime
from d2_mgd.export.students import Comparison, Signature, Student, size_of

__all__ = ["FORMATS", "Comparison", "Exported", "Options", "Runtime", "Signature", "Student", "export", "size_of"]
