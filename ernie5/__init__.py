"""ernie5 pretrains natively unified, ultra-sparse mixture-of-experts models over text, image, video and audio."""
