"""From encoded photographs to pixels: views, decoders, resizing, stored stages."""
