"""Request logs to bundles: importers, the simulator, fitting, calibration and evaluation."""
