"""How numbers are read off a live model: from the buffers, from shapes, from inputs."""
