r"""A ShareableList loses NULs at the end of str and bytes (gh-106939), and ends of what is not ASCII."""

from chosen import ShareableList

items = ShareableList([b"key\0\0", "ééééééé"])
print(list(items))
items.shm.close()
items.shm.unlink()
