"""Nothing keeps who is only to read a block from storing to it."""

from chosen import PEER, SharedMemory

import pyshare

block = SharedMemory(create=True, size=4096)
block.buf[:5] = b"table"

reader = SharedMemory(block.name) if PEER else pyshare.attach(block.name, readonly=True)
try:
    reader.buf[:5] = b"oops!"
except TypeError as error:
    print(f"TypeError: {error}; the block has {bytes(block.buf[:5])}")
else:
    print(f"the block has {bytes(block.buf[:5])}")
reader.close()
block.close()
block.unlink()
