"""A page to play with: a prompt drawn stock and patched, every technique with its controls. `sdattn-fast ui` serves it.

controls.py: what the controls say, as a condition and as Python. drawing.py: both pictures, maps, time and memory.
page.py: the page, in Gradio.
"""
