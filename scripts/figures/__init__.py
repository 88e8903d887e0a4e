"""The figures of docs/, a file a paper; scripts/draw_figures.py writes them."""
