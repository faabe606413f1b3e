"""One module per operation: its public function, and the fp32 reference it must equal. The legend of shape letters
stands in ``keysift.types``."""
