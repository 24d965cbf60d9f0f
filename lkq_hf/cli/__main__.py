from lkq_hf.cli import main

main()
