"""Drop-in surfaces of other libraries, written over cutehop's ops."""
