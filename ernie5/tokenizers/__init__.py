"""From raw text, pictures, clips and sound to one id space and back."""
