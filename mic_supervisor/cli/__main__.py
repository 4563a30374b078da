from mic_supervisor.cli import main

main()
