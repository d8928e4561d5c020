"""The report of training runs, in the order of its making: what was recorded (runs), the numbers
(summary), the plots (style, curves, gains), the HTML page (page).
"""
