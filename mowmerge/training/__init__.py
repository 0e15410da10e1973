"""What is learned on data: coefficients of static methods, and routers."""
