"""What is done with trained nets: opened by one grammar, evaluated, asked, measured, made smaller, given away."""
