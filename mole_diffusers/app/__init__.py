"""The app: compose pictures, see what the gates did, train gates, save. Needs gradio and matplotlib (the extra `app`)."""
