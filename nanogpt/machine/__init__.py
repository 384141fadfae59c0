"""The hardware: devices and what they can do, precision, CPU cores, memory allocation."""
