"""The app: compose pictures, see what the gates did, train gates, save. It needs gradio and matplotlib (extra `app`)."""
