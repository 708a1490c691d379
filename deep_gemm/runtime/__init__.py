"""From a kernel's text to a running kernel: compile, cache, inspect, launch."""
