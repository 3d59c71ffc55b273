"""The main job on real input: a DeepSeek-V3-shaped model generates with its own attention and with cutehop's."""
