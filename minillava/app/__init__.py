"""The command line: flags, chat, opening images, drawing overlays, listing methods."""
