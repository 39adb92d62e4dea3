"""Plan interventions: windows of layers, sites, donors and the conditions of a sweep."""
