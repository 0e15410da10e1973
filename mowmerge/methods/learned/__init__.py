"""Methods with coefficients that are found on data: a file a method, named as it is."""
