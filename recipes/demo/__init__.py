"""The demo model: its task, its training and its evaluation."""
