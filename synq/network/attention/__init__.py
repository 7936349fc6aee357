"""Attention: rewritten as the products and the softmax that it computes, and its tokens as a feature map."""
