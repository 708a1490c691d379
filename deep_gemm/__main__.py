import sys

from deep_gemm.cli import main

sys.exit(main())
