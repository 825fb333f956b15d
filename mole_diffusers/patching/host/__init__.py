"""What differs between denoisers: their arguments, the places of gates in them, offloading and compiled blocks."""
