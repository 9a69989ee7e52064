"""An adapter and its base become plain weights, proved equal, with the files beside them."""
