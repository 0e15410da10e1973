"""What a dynamic checkpoint is at run time: format, codecs, layers, routers, modeling."""
