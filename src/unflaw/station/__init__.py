"""The inspection station: an HTTP service with a page, a watcher of folders, and the log that both write. No torch."""
