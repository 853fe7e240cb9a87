"""From files to results: the base of all predictors, folders of images, groups of images, annotations."""
