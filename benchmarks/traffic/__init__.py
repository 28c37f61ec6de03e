"""Bytes that the processes of a distillation send and hold, beside the formulas of docs/scaling.md."""
