"""An adapter in a form that other programs serve, proved equal where that form can hold it."""
