"""Files by path or URL, and the pictures and videos in them."""
