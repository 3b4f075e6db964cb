"""What speculation earns: speed against plain decoding, acceptance without flattery, quality, peers."""
