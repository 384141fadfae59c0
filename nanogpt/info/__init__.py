"""What a file or folder is: descriptions without reading weights, and what differs between two."""
