"""Whoever attaches is told a size that nobody asked for (gh-145954)."""

from chosen import SharedMemory

block = SharedMemory(create=True, size=5000)
other = SharedMemory(block.name)
print(f"asked for 5000, attached {other.size}")
other.close()
block.close()
block.unlink()
