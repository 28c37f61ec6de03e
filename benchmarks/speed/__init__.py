"""Speed and memory beside the floor and the alternatives: what `make bench` measures."""
