"""Where text comes from: folders, archives, file formats, encodings. Needs no PyTorch."""
