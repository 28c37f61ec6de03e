"""Accuracy of the methods side by side: studies, a runner that can be cut short, tables and plots."""
