"""What artists use: `studio` turns a recipe into a picture, `web` is the page in the browser."""
