"""What the tests stand on: running programs, a scripted queue, a model hub, the demo model's questions."""
