"""Programs that use the packages; nothing imports them."""
