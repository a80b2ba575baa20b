"""The command line: its flags, answers and chat, image files, overlays and the list of methods."""
