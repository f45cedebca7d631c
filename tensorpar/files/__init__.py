"""Files and folders of tensors: found, planned, read in parts, written, and replaced as a whole.

Nothing here communicates or knows of models.
"""
