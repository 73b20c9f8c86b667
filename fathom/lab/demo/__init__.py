"""`fathom demo`: a small model trained here, and a page with what it learned."""
