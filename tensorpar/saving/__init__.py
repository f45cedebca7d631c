"""`save_pretrained` of a parallel model: who writes which bytes of an ordinary folder."""
