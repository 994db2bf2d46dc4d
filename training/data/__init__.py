"""Small procedural worlds with pictures, sound and captions, and a rule-based judge of films about them."""
