"""The app: compose, see why, train, keep. Needs gradio and matplotlib (the extra `app`)."""
