"""What is fuzzed: inputs drawn by hypothesis, and for each kind what must hold of every one of them.

`numbers` is about matchings and reducers, `files` about what strangers hand in, `command_lines` about what people type.
The suite tries some inputs of each (tests/fuzz), `python -m benchmarks.fuzz` many.
"""
